"""glmft predict: a data set or a file of prompts through the base and what was trained, with scores."""
