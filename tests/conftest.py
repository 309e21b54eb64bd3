"""One thread for every test: the models are tiny, and two workers share the machine."""

import torch

torch.set_num_threads(1)
