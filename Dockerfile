FROM python:3.11-slim
# g++ is what torch.compile builds its CPU kernels with
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home dudes
USER dudes
WORKDIR /home/dudes/dudes
COPY --chown=dudes requirements.txt .
RUN python3 -m venv .venv && .venv/bin/pip install -r requirements.txt
ENV PATH="/home/dudes/dudes/.venv/bin:$PATH"
COPY --chown=dudes *.py ./
CMD ["sh", "-c", "python train_ensemble.py --members 10 && python distill.py --teacher ckpts/ && python evaluate.py --ood"]
