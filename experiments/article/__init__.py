"""The article's experiment: every way to run the experts on one grid (launch/article.sh)."""
