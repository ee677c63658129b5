"""Self-supervised pretraining that spends its steps on the samples worth training on (EMP, arXiv 2408.16031).

Images live as one uint8 tensor on the device (`images`); each epoch a pure function of (scores, plan, seed)
picks the kept index set there (`pruning`); each step cuts two views of a batch (`augment`), trains SimCLR
(`model`, `loss`, `optim`) and writes every sample's score back from the same forward pass. `pretrain.py` is
that story, top to bottom; what it leaves behind is an encoder: `load_encoder("runs/demo")`.
"""

from ssl_emp._version import __version__
from ssl_emp.classifier import load_classifier
from ssl_emp.model import load_encoder

__all__ = ["__version__", "load_classifier", "load_encoder"]
