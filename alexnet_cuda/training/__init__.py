"""Training runs that recipes describe."""

from ..recipe import Recipe, RecipeError, list_recipes, load_recipe

__all__ = ["Recipe", "RecipeError", "list_recipes", "load_recipe"]
