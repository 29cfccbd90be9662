"""The use-cases (service) and the front-ends that translate to them."""
