"""The mathematics: gradient factors, the editor network, low-rank changes, losses. Imports torch only."""
