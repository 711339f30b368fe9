"""What scripts, models, data sets and criterions share. Imports none of them."""
