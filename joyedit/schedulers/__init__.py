"""Solvers and their noise schedules."""
