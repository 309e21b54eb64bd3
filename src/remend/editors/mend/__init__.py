"""MEND: editor networks that turn gradient factors into a low-rank edit (Mitchell et al., ICLR 2022)."""
