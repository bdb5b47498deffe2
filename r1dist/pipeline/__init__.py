"""The R1 stages as a graph that runs, resumes and reports."""
