"""Configuration: LLaMA-Factory's flat YAML keys become one frozen, checked, fully resolved value."""
