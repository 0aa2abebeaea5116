"""A page about a run, or several runs beside each other, made of nothing but what run folders hold."""
