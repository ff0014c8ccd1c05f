"""Models on which a converted model must equal ``torch.autocast`` bit for bit."""
