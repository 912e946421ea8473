"""A local web page: upload or draw a picture, see what a trained network predicts and the evidence for it."""
