"""Recipes: train and evaluate an editor for one row of the paper's tables, or for a recent model, at full size."""

from remend.recipes.recipe import Recipe, load_recipe, recipes
from remend.recipes.run import run_recipe

__all__ = ["Recipe", "load_recipe", "recipes", "run_recipe"]
