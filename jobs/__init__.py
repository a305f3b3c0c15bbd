"""What runs the commands: recipes, comparisons, pipelines."""
