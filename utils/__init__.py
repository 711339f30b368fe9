"""What scripts, models, data sets and criterions share. Of what is here only commands, which measure, import them."""
