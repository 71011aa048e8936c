"""Everything that knows what TF-NAS is."""

from models.model_eval import NetworkEval, load_network

__all__ = ['NetworkEval', 'load_network']
