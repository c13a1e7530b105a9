"""First stages: encoders that embed texts and images as single vectors, to find the candidates."""
