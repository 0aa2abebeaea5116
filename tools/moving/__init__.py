"""A small world that moves: clips of the built-in icons, a tiny Wan that draws them, a reward and a judge."""
