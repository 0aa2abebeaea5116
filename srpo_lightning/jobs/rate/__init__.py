"""`rate`: people judge the pictures of several runs or checkpoints without knowing whose they are."""
