"""Soft modality scores of SMoES on the model's device: `estimators` names them, each is a module of its own."""
