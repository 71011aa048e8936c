"""TF-NAS: search space, supernet, latency model and found networks."""

from models.model_eval import NetworkEval, load_network

__all__ = ['NetworkEval', 'load_network']
