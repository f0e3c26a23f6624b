"""A kernel that is worse on purpose: a check that lets it pass checks nothing."""
