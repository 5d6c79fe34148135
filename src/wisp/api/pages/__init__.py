"""The web pages of edge, verifier and router: static files (`site`), and what they show (`recorder`, `stream`)."""
