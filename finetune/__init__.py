"""From a hand-off bundle to a tuned model, texts and scores. Imports `pretrain`, never the other way round."""
