"""The report of runs as one HTML file: what a page is made of, without a word of configs and commands."""
