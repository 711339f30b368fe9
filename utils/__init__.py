"""What scripts, models, data sets and criterions share; and what measures and reports, which builds on them."""
