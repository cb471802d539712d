"""One HTML page of one or several runs."""
