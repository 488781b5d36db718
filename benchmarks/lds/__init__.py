"""The linear data-modelling score: do influence scores predict what retraining does?"""
