"""One HTML page about run folders: read what is there, count, draw."""
