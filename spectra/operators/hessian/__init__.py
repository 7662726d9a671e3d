"""The Hessian of a model's loss as an operator: the loss, its graphs, the engines that multiply."""
