"""The mathematics of InfAlign (arXiv 2412.19792) and of best-of-N on the calibrated scale. Numbers in, numbers out.

On the calibrated scale a sample of the reference policy has a value u that is uniform on [0, 1] (no ties), a policy is
a density f(u) against it, and KL and win rates are integrals over u, the same for every prompt, model and reward.

Only numpy and scipy are needed; nothing here reads a request, a file or a model.
"""
