"""The mathematics of model editing, in torch only: low-rank changes, gradient factors, hooks, MEND's editor network."""
