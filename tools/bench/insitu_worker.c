#include "tools/bench/insitu_worker.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define STAGING ((uint64_t)32 << 20)
#define WAIT_MS 60000

int rig_client(const struct rig *rig, int r, const char *what)
{
	if (r < 0)
		(void)fprintf(stderr, "kvgate-bench: %s: %s: %s\n", what, strerror(-r),
			rig->client ? kvg_error(rig->client) : "");
	return r;
}

int rig_driver(const struct rig *rig, CUresult result, const char *what)
{
	return synthetic_result(rig->synthetic, result, what);
}

/* ---- MPS ---- */

/* A control daemon of our own: processes that inherit these variables are its server's clients. */
static int start_mps(char dir[SERVICE_PATH])
{
	(void)snprintf(dir, SERVICE_PATH, "/tmp/kvgate-mps.XXXXXX");
	if (!mkdtemp(dir))
		return -errno;
	(void)setenv("CUDA_MPS_PIPE_DIRECTORY", dir, 1);
	(void)setenv("CUDA_MPS_LOG_DIRECTORY", dir, 1);
	if (system("nvidia-cuda-mps-control -d </dev/null >/dev/null 2>&1") == 0)
		return 0;
	(void)fprintf(stderr, "kvgate-bench: nvidia-cuda-mps-control does not start\n");
	return -ENOENT;
}

static void stop_mps(const char *dir)
{
	char command[SERVICE_PATH + 16];

	if (system("echo quit -t 10 | nvidia-cuda-mps-control >/dev/null 2>&1") != 0)
		(void)fprintf(stderr, "kvgate-bench: the MPS server did not end\n");
	(void)snprintf(command, sizeof(command), "rm -rf -- '%s'", dir);
	(void)!system(command);
	(void)unsetenv("CUDA_MPS_PIPE_DIRECTORY");
	(void)unsetenv("CUDA_MPS_LOG_DIRECTORY");
}

int rig_run(bool mps, int (*run)(void *user), void *user)
{
	char dir[SERVICE_PATH];
	int status = 0, r = mps ? start_mps(dir) : 0;
	pid_t pid;

	if (!mps || r < 0)
		return r < 0 ? r : run(user);
	(void)fflush(NULL);
	pid = fork();
	if (pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		r = run(user);
		(void)fflush(NULL);
		_exit(r < 0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status))
		r = -ECHILD;
	stop_mps(dir);
	return r;
}

/* ---- the parts ---- */

static int start_service(struct rig *rig, const struct rig_options *options)
{
	char config[512], extent[64] = "";
	int r;

	if (options->extent)
		(void)snprintf(extent, sizeof(extent), "extent_size = %llu\n", (unsigned long long)options->extent);
	(void)snprintf(config, sizeof(config),
		"[pool]\nkind = cuda\ndevice.index = %d\ndevice.size = %llu\nhost.size = %llu\n%s[daemon]\nwait_ms = "
		"%d\n"
		"[tenant a]\nsocket = a.sock\nipc = yes\n",
		options->device, (unsigned long long)options->pool, (unsigned long long)options->host, extent, WAIT_MS);
	r = service_start(&rig->service, options->kvgated, config);
	return r < 0 ? r : service_status(&rig->service, &rig->status);
}

static void make_layout(struct kvg_layout *layout, const struct rig_options *options)
{
	*layout = (struct kvg_layout){.model = "kvgate-bench",
		.hidden_dim = MODEL_HIDDEN,
		.group_count = 1,
		.max_sequences = options->sequences,
		.max_tokens = options->max_tokens};
	layout->groups[0] = (struct kvg_group){.kind = KVG_GROUP_GLOBAL,
		.layers = options->layers,
		.head_count = MODEL_HEADS,
		.head_total = MODEL_HEADS,
		.world = 1,
		.k_dim = MODEL_DIM,
		.v_dim = MODEL_DIM,
		.k_dtype = KVG_BF16,
		.v_dtype = KVG_BF16,
		.block_tokens = KVG_BLOCK_TOKENS,
		.query_heads = MODEL_GROUP};
}

static int load_gate(struct rig *rig, const struct rig_options *options)
{
	char path[SERVICE_PATH];
	int r = model_write_gate(service_path(&rig->service, "gate.safetensors", path), options->layers);

	if (r == 0)
		r = rig_client(rig, kvg_load_gate(rig->client, path), "gate");
	(void)unlink(path);
	return r;
}

static int open_client(struct rig *rig, const struct rig_options *options)
{
	char path[SERVICE_PATH], text[SERVICE_TEXT] = "";
	struct kvg_layout layout;
	int r = kvg_connect(
		service_path(&rig->service, "a.sock", path), "kvgate-bench", &rig->client, text, sizeof(text));

	if (r < 0) {
		(void)fprintf(stderr, "kvgate-bench: %s\n", text);
		return r;
	}
	make_layout(&layout, options);
	r = rig_client(rig, kvg_set_stream(rig->client, rig->synthetic->stream), "stream");
	if (r == 0)
		r = rig_client(rig, kvg_register(rig->client, &layout, STAGING), "register");
	if (r == 0)
		r = rig_client(rig, kvg_view(rig->client, &rig->view), "view");
	return r == 0 ? load_gate(rig, options) : r;
}

int rig_open(struct rig *rig, const struct rig_options *options)
{
	int r;

	*rig = (struct rig){.client = NULL};
	r = start_service(rig, options);
	if (r == 0)
		r = synthetic_open(options->device, &rig->synthetic);
	if (r == 0)
		r = open_client(rig, options);
	if (r == 0)
		r = model_new(rig->synthetic, options->layers, options->rows, options->wide, &rig->model);
	return r;
}

int rig_close(struct rig *rig)
{
	if (rig->synthetic)
		(void)rig->synthetic->cuda->driver->cuStreamSynchronize(rig->synthetic->stream);
	rig->model = model_free(rig->model);
	rig->client = kvg_close(rig->client);
	rig->synthetic = synthetic_close(rig->synthetic);
	return service_stop(&rig->service);
}

int rig_stage_scores(struct rig *rig, uint64_t seq, uint32_t layers, uint32_t pos, uint32_t count, uint64_t *random)
{
	float *scores = malloc((size_t)count * MODEL_HEADS * sizeof(*scores));
	int r = scores ? 0 : -ENOMEM;

	for (uint32_t layer = 0; r == 0 && layer < layers; layer++) {
		for (uint32_t i = 0; i < count * MODEL_HEADS; i++) {
			*random = *random * 6364136223846793005u + 1442695040888963407u;
			/* Some heads matter more than others, so that rows differ in length. */
			scores[i] =
				(float)(*random >> 40) / (float)(1 << 24) * (float)(1 + i % MODEL_HEADS) / MODEL_HEADS;
		}
		r = kvg_stage_scores(rig->client, seq, layer, pos, count, scores);
	}
	free(scores);
	return rig_client(rig, r, "scores");
}
