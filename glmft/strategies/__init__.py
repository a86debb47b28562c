"""A fine-tuning strategy is a transform of a model: one class with a typed constructor, one YAML in conf/strategy."""
