"""Tests over the whole DAG."""
