"""glmft serve: base and adapters behind OpenAI's chat API, for this machine and its programs."""
