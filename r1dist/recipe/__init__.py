"""The stages of a recipe, run one after another as commands of their own."""
