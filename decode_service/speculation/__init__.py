"""Speculative decoding: who proposes drafts (`proposer`), and how many of them a step verifies (`speculator`).

Torch-free. A draft token is kept exactly when it equals the token that is drawn at its place anyway, so nothing in this
package can change a token: what it decides is how many tokens a step brings, and what that costs.
"""
