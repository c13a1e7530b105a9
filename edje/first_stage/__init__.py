"""First stages: models that embed texts and images as single vectors to find the candidates."""
