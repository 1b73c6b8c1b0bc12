"""How an expert is trained: its recipe, its data, the LightningModule, and the steps from a recipe to a card."""
