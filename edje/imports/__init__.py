"""Imports of published weights: the authors' checkpoints, BERT and SigLIP layouts, and the sources of files."""
