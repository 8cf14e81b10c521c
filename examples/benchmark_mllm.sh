#!/usr/bin/env bash
# Evaluates a video MLLM with lmms-eval on one GPU: without pruning, with a selector, or with vLLM's EVS. Needs the Hub, or its cache.
#
#     examples/benchmark_mllm.sh qwen2_5_vl dense             # no pruning, with tokens and seconds logged
#     examples/benchmark_mllm.sh qwen2_5_vl gaze              # the same with a selector before the tower
#     examples/benchmark_mllm.sh qwen2_5_vl own               # lmms-eval's own model, without these logs
#     examples/benchmark_mllm.sh qwen2_5_vl vllm-dense        # through `vllm serve`, which this script starts and stops
#     examples/benchmark_mllm.sh qwen2_5_vl vllm-gaze
#     examples/benchmark_mllm.sh qwen2_5_vl vllm-evs          # drops tokens after the tower, as many as vllm-gaze drops before it
#
# MLLMs: qwen2_5_vl and qwen3_vl, and without vLLM also llava_onevision and nvila_hd. docs/benchmarks.md explains the installation.
set -euo pipefail

mllm=${1:?name an MLLM: qwen2_5_vl, qwen3_vl, llava_onevision or nvila_hd}
method=${2:?name a method: dense, gaze, own, vllm-dense, vllm-gaze or vllm-evs}
TASKS=${TASKS:-videomme,mlvu_dev,longvideobench_val_v,mvbench,hlvid}  # hlvid reads its videos from HLVID_VIDEOS
FRAMES=${FRAMES:-64}
PIXELS=${PIXELS:-200704}      # maximum of a frame: 448x448
RATIO=${RATIO:-0.25}          # share of a video's tokens to keep
SELECTOR=${SELECTOR:-features}  # for nvila_hd one with four scales, such as greedy, or published: the one inside its processor
OUTPUT=${OUTPUT:-outputs/benchmarks}
PYTHON=${PYTHON:-.venv-lmms-eval/bin/python}
VLLM=${VLLM:-vllm}            # of an environment with transformers-autogaze[vllm]
PORT=${PORT:-8000}

frames="max_num_frames=$FRAMES,max_pixels=$PIXELS"
own=$mllm options=()
case $mllm in
qwen2_5_vl) name=Qwen/Qwen2.5-VL-7B-Instruct ;;
qwen3_vl) name=Qwen/Qwen3-VL-8B-Instruct ;;
llava_onevision)
    name=llava-hf/llava-onevision-qwen2-7b-ov-hf frames="max_frames_num=$FRAMES"
    own=llava_hf options=(--force_simple)
    ;;
nvila_hd) name=nvidia/NVILA-8B-HD-Video frames="num_video_frames=$FRAMES,num_video_frames_thumbnail=$FRAMES" ;;
*) echo "the MLLM must be qwen2_5_vl, qwen3_vl, llava_onevision or nvila_hd, got $mllm" >&2; exit 2 ;;
esac
kept="clip_ratio=$RATIO"
case $mllm/$method in
llava_onevision/vllm-* | nvila_hd/vllm-* | nvila_hd/own) echo "$mllm does not support the method $method" >&2; exit 2 ;;
nvila_hd/gaze) [[ $SELECTOR == published ]] && kept="" || kept="gazing_ratio=$RATIO" ;;
esac

evaluate() { # arguments: model of lmms-eval, its model_args, further options
    local model=$1 arguments=$2
    shift 2
    "$PYTHON" -m lmms_eval --model "$model" --model_args "$arguments" --tasks "$TASKS" --batch_size 1 \
        --include_path "$("$PYTHON" -c 'from transformers_autogaze.lmms_harness import TASKS; print(TASKS)')" \
        --log_samples --output_path "$OUTPUT/$mllm/$method" "$@"
    "$PYTHON" -m transformers_autogaze.lmms_harness.results_table "$OUTPUT/$mllm/$method"
}

serve_and_evaluate() { # arguments: options of `vllm serve`
    # vLLM takes the number of frames that lmms-eval sends with a request from clients that it trusts, and with this loader.
    "$VLLM" serve "$name" --port "$PORT" --max-model-len 65536 --allowed-local-media-path / --trust-request-mm-kwargs \
        --media-io-kwargs '{"video": {"video_backend": "opencv"}}' "$@" &
    local server=$!
    trap "kill $server" EXIT
    until curl --silent --fail "http://localhost:$PORT/health"; do
        kill -0 $server || { echo "vllm serve has ended" >&2; exit 1; }
        sleep 5
    done
    evaluate openai "model_version=$name,base_url=http://localhost:$PORT/v1,api_key=EMPTY,timeout=600,num_concurrent=1,pass_video_url=True,max_frames_num=$FRAMES"
}

case $method in
dense) evaluate "gaze_$mllm" "pretrained=$name,device_map=auto,$frames,selector=none" ;;
gaze) evaluate "gaze_$mllm" "pretrained=$name,device_map=auto,$frames,selector=$SELECTOR${kept:+,$kept}" ;;
own) evaluate "$own" "pretrained=$name,device_map=auto,$frames" "${options[@]}" ;;
vllm-dense) serve_and_evaluate --mm-processor-kwargs "{\"max_pixels\": $PIXELS}" ;;
vllm-gaze) serve_and_evaluate --mm-processor-kwargs "{\"max_pixels\": $PIXELS, \"gaze_model\": \"$SELECTOR\", \"gazing_ratio\": $RATIO}" ;;
vllm-evs) serve_and_evaluate --mm-processor-kwargs "{\"max_pixels\": $PIXELS}" --video-pruning-rate "$("$PYTHON" -c "print(1 - $RATIO)")" ;;
*) echo "the method must be dense, gaze, own, vllm-dense, vllm-gaze or vllm-evs, got $method" >&2; exit 2 ;;
esac
