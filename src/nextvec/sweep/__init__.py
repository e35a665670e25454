"""The ablation bench: rows of settings times seeds at an equal budget, one result file each, and the tables made of them."""
