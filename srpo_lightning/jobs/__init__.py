"""Commands beside fit, validate, test and predict: each file is one, a function whose arguments are its options."""
