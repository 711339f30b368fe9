"""Code shared by scripts, models, data sets and criterions; only the measuring commands here import any of those."""
