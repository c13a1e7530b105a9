"""Weights from elsewhere: the authors' checkpoints, BERT and SigLIP layouts, and where files come from."""
