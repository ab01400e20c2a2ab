"""Training. Read `recipe` first: it is the whole run on one page."""
