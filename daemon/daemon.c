#include "daemon/daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "daemon/base/cleanup.h"
#include "daemon/base/log.h"
#include "daemon/device.h"
#include "daemon/sequence/compute.h"
#include "daemon/sequence/context.h"
#include "proto/size.h"
#include "daemon/session/admin.h"
#include "daemon/session/listener.h"
#include "daemon/session/pressure.h"
#include "daemon/session/worker.h"
#include "daemon/tier/host.h"

#define STOP_POLL_NS      UINT64_C(1000000)
#define LOST_LIMIT_NS     UINT64_C(5000000000) /* for the end of an orderly stop once the device is lost */
#define PRESSURE_GRACE_NS UINT64_C(2000000000) /* longer than that, requests wait: for what a dead worker leaves */
#define LOOK_NS           1000000000u          /* between looks at the device while there are workers */

/* For the service manager: what the memory of min may take to be created. */
#define RESERVE_LIMIT_US UINT64_C(600000000)

struct endpoint {
	struct server *server;
	struct tenant *tenant;
	char *path;
	struct listener *listener;
};

struct daemon {
	const struct config *config;
	const struct daemon_options *options;
	struct server server;
	struct admin admin;
	struct endpoint *endpoints; /* of the tenants */
	struct endpoint admin_endpoint;
	struct kind *kind; /* owned, unless it came with the options */
	uint64_t extent_size;
	struct loop_timer *stop_timer;
	struct loop_watch *failure_watch;
	struct loop_timer *look_timer;
	struct job look; /* at the device */
	bool looking;
	char stop_reason[KIND_TEXT + 64];
	uint64_t lost_ns; /* when the device was lost; 0: it was not */
	int lock_fd;
	bool stopping;
};

static void accept_worker(void *user, int fd, const struct ucred *peer)
{
	struct endpoint *endpoint = user;

	if (endpoint->tenant->workers >= endpoint->tenant->limits.connections) {
		worker_refuse(fd, -EUSERS, "%s: %u connections, at most %u (max_connections)",
			endpoint->tenant->quota.name, endpoint->tenant->workers, endpoint->tenant->limits.connections);
		(void)close(fd);
		return;
	}
	if (worker_new(endpoint->server, endpoint->tenant, fd, peer) < 0)
		log_error("%s: no memory for a connection", endpoint->path);
}

static void refuse_worker(void *user, int fd, const struct ucred *peer)
{
	const struct endpoint *endpoint = user;

	worker_refuse(fd, -EACCES, "%s: uid %u is not among the uids that may connect", endpoint->tenant->quota.name,
		peer->uid);
}

/* ---- state directory and paths ---- */

static int take_lock(struct daemon *daemon)
{
	const char *dir = daemon->options->state_dir;
	char *path;

	if (mkdir(dir, 0755) < 0 && errno != EEXIST) {
		log_error("state directory %s: %s", dir, strerror(errno));
		return -errno;
	}
	if (asprintf(&path, "%s/lock", dir) < 0)
		return -ENOMEM;
	daemon->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (daemon->lock_fd < 0)
		log_error("state directory %s: lock: %s", dir, strerror(errno));
	else if (flock(daemon->lock_fd, LOCK_EX | LOCK_NB) < 0)
		log_error("state directory %s: another kvgated uses it", dir);
	else
		errno = 0;
	free(path);
	return errno ? -errno : 0;
}

/* A relative path counts from the state directory. */
static char *full_path(const struct daemon *daemon, const char *path)
{
	char *full;

	if (path[0] == '/')
		return strdup(path);
	return asprintf(&full, "%s/%s", daemon->options->state_dir, path) < 0 ? NULL : full;
}

static char *budgets_dir(const struct daemon *daemon)
{
	const struct daemon_options *options = daemon->options;
	const char *otherwise = options->budgets_dir ? options->budgets_dir : options->state_dir;

	return daemon->config->budgets_dir ? full_path(daemon, daemon->config->budgets_dir) : strdup(otherwise);
}

/* ---- sockets ---- */

static int listen_tenant(struct daemon *daemon, size_t index)
{
	const struct config_tenant *config = &daemon->config->tenants[index];
	struct endpoint *endpoint = &daemon->endpoints[index];
	bool overridden = index == 0 && daemon->options->socket;
	struct listener_options options = {.mode = config->mode,
		.owner = (uid_t)-1,
		.group = (gid_t)-1,
		.uids = config->uids,
		.uid_count = config->uid_count,
		.refuse = refuse_worker};
	char text[LISTENER_TEXT];
	int r;

	endpoint->server = &daemon->server;
	endpoint->tenant = daemon->server.tenants[index];
	endpoint->path = overridden ? strdup(daemon->options->socket) : full_path(daemon, config->socket);
	if (!endpoint->path)
		return -ENOMEM;
	endpoint->tenant->socket = endpoint->path;
	options.path = endpoint->path;
	if (config->uid_count && geteuid() == 0)
		options.owner = config->uids[0]; /* so that a mode of 0600 lets the tenant in */
	r = listener_new(daemon->server.loop, &options, accept_worker, endpoint, &endpoint->listener, text);
	if (r < 0)
		log_error("tenant %s: %s", config->name, text);
	return r;
}

static int listen_admin(struct daemon *daemon)
{
	const struct config *config = daemon->config;
	struct endpoint *endpoint = &daemon->admin_endpoint;
	struct listener_options options = {.mode = config->admin_mode, .owner = (uid_t)-1, .group = (gid_t)-1};
	const struct group *group = config->admin_group ? getgrnam(config->admin_group) : NULL;
	char text[LISTENER_TEXT];
	int r;

	if (config->admin_group && !group) {
		log_error("[admin] group: there is no group %s", config->admin_group);
		return -ENOENT;
	}
	if (group)
		options.group = group->gr_gid;
	endpoint->path = full_path(daemon, config->admin_socket ? config->admin_socket : "admin.sock");
	if (!endpoint->path)
		return -ENOMEM;
	options.path = endpoint->path;
	r = listener_new(daemon->server.loop, &options, admin_accept, &daemon->admin, &endpoint->listener, text);
	if (r < 0)
		log_error("admin: %s", text);
	return r;
}

static void close_endpoint(struct endpoint *endpoint)
{
	endpoint->listener = listener_free(endpoint->listener);
	free(endpoint->path);
	endpoint->path = NULL;
}

/* ---- start ---- */

static int start_kind(struct daemon *daemon)
{
	char text[DEVICE_TEXT];
	int r = 0;

	daemon->kind = daemon->options->kind;
	if (!daemon->kind)
		r = device_open(daemon->config, &daemon->kind, text);
	if (r >= 0)
		r = device_check(daemon->config, daemon->kind, &daemon->extent_size, text);
	if (r >= 0)
		r = compute_start(daemon->kind, text, sizeof(text));
	if (r < 0)
		log_error("%s", text);
	return r;
}

static int start_memory(struct daemon *daemon)
{
	struct server *server = &daemon->server;
	int r = loop_new(&server->loop);

	if (r < 0) {
		log_error("io_uring: %s (this kernel or its settings do not allow it)", strerror(-r));
		return r;
	}
	r = start_kind(daemon);
	if (r < 0)
		return r;
	r = executor_new(server->loop, &server->executor);
	if (r >= 0)
		r = pool_new(server->loop, server->executor, daemon->kind, daemon->config->device_size,
			daemon->extent_size, &server->pool);
	if (r >= 0)
		r = host_tier_new(server->pool, daemon->config->host_size, &server->tier);
	if (r < 0)
		log_error("memory: %s", strerror(-r));
	return r;
}

static uint64_t at_most(uint64_t value, uint64_t limit)
{
	return value < limit ? value : limit;
}

/* As configured, but for what is no whole extent of the pool and therefore nobody's. */
static int set_budget(struct tenant *tenant, const struct config_tenant *config, enum tenant_tier tier)
{
	const struct pool *pool = tenant->pool;
	uint64_t most = tier == TENANT_HOST ? pool->host.account->max : pool->quota.account->max;
	struct budget budget = config->budgets[tier];
	char text[QUOTA_TEXT];
	int r;

	budget.max = at_most(budget.max, most);
	budget.high = at_most(budget.high, most);
	r = tenant_set_budget(tenant, tier, &budget, text);
	if (r < 0)
		log_error("%s", text);
	return r;
}

static int start_tenant(struct daemon *daemon, const struct config_tenant *config, struct tenant **ret)
{
	struct pool *pool = daemon->server.pool;
	int r = tenant_new(pool, config->name, 0, ret);

	if (r < 0) {
		log_error("tenant %s: %s", config->name, strerror(-r));
		return r;
	}
	(*ret)->ipc = config->ipc;
	(*ret)->limits = config->limits;
	(*ret)->reclaim = &daemon->server.reclaim;
	return 0;
}

static int start_tenants(struct daemon *daemon)
{
	const struct config *config = daemon->config;
	struct server *server = &daemon->server;
	int r;

	server->pressure_ns = (uint64_t)config->pressure_ms * 1000000;
	server->tenants = calloc(config->tenant_count, sizeof(struct tenant *));
	daemon->endpoints = calloc(config->tenant_count, sizeof(struct endpoint));
	if (!server->tenants || !daemon->endpoints)
		return -ENOMEM;
	r = reclaim_init(&server->reclaim, server->loop, server->pool, server->tenants, &server->tenant_count,
		server->pressure_ns + PRESSURE_GRACE_NS, &pressure_ops, server);
	if (r < 0)
		return r;
	for (; server->tenant_count < config->tenant_count; server->tenant_count++) {
		r = start_tenant(
			daemon, &config->tenants[server->tenant_count], &server->tenants[server->tenant_count]);
		if (r < 0)
			return r;
	}
	return 0;
}

/* Those of the configuration, then what was set before a restart. */
static int start_budgets(struct daemon *daemon)
{
	struct server *server = &daemon->server;
	_cleanup_free_ char *dir = budgets_dir(daemon);
	char text[BUDGET_TEXT];
	int r = 0;

	for (size_t i = 0; r >= 0 && i < server->tenant_count * TENANT_TIERS; i++)
		r = set_budget(server->tenants[i / TENANT_TIERS], &daemon->config->tenants[i / TENANT_TIERS],
			(enum tenant_tier)(i % TENANT_TIERS));
	if (r < 0)
		return r;
	r = !dir ? -ENOMEM : budgets_new(server->loop, server->tenants, server->tenant_count, dir, &server->budgets);
	if (r < 0) {
		log_error("budgets: %s", strerror(-r));
		return r;
	}
	r = budgets_load(server->budgets, text);
	if (r < 0)
		log_error("%s", text);
	return r;
}

/* Whether the memory of every min is there, or that of some cannot be. */
static bool reserves_are_decided(const struct server *server, int *ret_status)
{
	bool settled = true;

	*ret_status = 0;
	for (size_t i = 0; i < server->tenant_count; i++) {
		const struct reserve *reserve = &server->tenants[i]->reserve;

		settled &= reserve_is_settled(reserve);
		if (!reserve->busy && reserve->status < 0)
			*ret_status = reserve->status;
	}
	return settled || *ret_status < 0;
}

static void on_reserve(void *user)
{
	struct daemon *daemon = user;
	int status;

	if (reserves_are_decided(&daemon->server, &status))
		loop_stop(daemon->server.loop);
}

/*
 * The daemon is ready when the memory of its tenants' min exists. What cannot be created has been logged. A signal
 * ends this, too.
 */
static int start_reserves(struct daemon *daemon)
{
	struct server *server = &daemon->server;
	int r = 0, status;

	if (!reserves_are_decided(server, &status)) {
		(void)sd_notifyf(0, "STATUS=Creating the memory of min\nEXTEND_TIMEOUT_USEC=%llu",
			(unsigned long long)RESERVE_LIMIT_US);
		server->pool->reserve_ended = on_reserve;
		server->pool->reserve_user = daemon;
		r = loop_run(server->loop);
		server->pool->reserve_ended = NULL;
		(void)reserves_are_decided(server, &status);
	}
	return r < 0 ? r : daemon->stopping ? 0 : status;
}

/*
 * The loop goes on until every worker's memory is back and nothing is on the executor any more. Once the device is lost
 * nothing of it can come back but by the end of the process, which therefore does not wait for ever.
 */
static void check_stopped(void *user)
{
	struct daemon *daemon = user;

	if (daemon->server.worker_count == 0 && executor_pending(daemon->server.executor) == 0) {
		loop_stop(daemon->server.loop);
	} else if (daemon->lost_ns && loop_now() - daemon->lost_ns > LOST_LIMIT_NS) {
		log_error("%u workers could not be taken down in order", daemon->server.worker_count);
		_exit(DAEMON_DEVICE_LOST);
	} else {
		loop_timer_set(daemon->stop_timer, STOP_POLL_NS);
	}
}

/* Tells everybody, and lets go of what they hold. */
static void begin_stop(struct daemon *daemon)
{
	daemon->stopping = true;
	reserve_stop_all(daemon->server.pool);
	(void)sd_notify(0, "STOPPING=1\nSTATUS=Stopping");
	for (size_t i = 0; i < daemon->server.tenant_count; i++)
		close_endpoint(&daemon->endpoints[i]);
	close_endpoint(&daemon->admin_endpoint);
	admin_deinit(&daemon->admin);
	server_stop(&daemon->server, daemon->stop_reason);
	check_stopped(daemon);
}

static void on_signal(void *user, int signal)
{
	struct daemon *daemon = user;

	if (daemon->stopping)
		return;
	log_info("%s: stopping", strsignal(signal));
	(void)snprintf(daemon->stop_reason, sizeof(daemon->stop_reason), "the daemon is stopping");
	begin_stop(daemon);
}

/* The device is lost: the kind's failure_fd() can be read. */
static void on_failure(void *user, uint32_t revents)
{
	struct daemon *daemon = user;
	const struct server *server = &daemon->server;
	char failure[KIND_TEXT], size[KVG_SIZE_TEXT];

	(void)revents;
	if (daemon->lost_ns || !daemon->kind->ops->failure(daemon->kind, failure))
		return;
	daemon->lost_ns = loop_now();
	log_error(
		"GPU error %s: the KV of %u workers, %s, is lost; the daemon ends with status %d, to be started again",
		failure, server->worker_count, kvg_size_format(server->pool->quota.account->charged, size),
		DAEMON_DEVICE_LOST);
	if (daemon->stopping)
		return;
	(void)snprintf(daemon->stop_reason, sizeof(daemon->stop_reason), "GPU error %s: the daemon restarts", failure);
	begin_stop(daemon);
}

/*
 * A fault that another client of the MPS server caused shows only in a call of the driver. While there are workers the
 * device is asked once in a while, so that they learn of it though none of them asks for anything.
 */
static void look_run(struct job *job)
{
	struct daemon *daemon = list_entry(job, struct daemon, look);
	uint64_t used;

	(void)daemon->kind->ops->usage(daemon->kind, &used);
}

static void look_done(struct job *job)
{
	list_entry(job, struct daemon, look)->looking = false;
}

static void look_at_device(void *user)
{
	struct daemon *daemon = user;

	if (daemon->server.worker_count > 0 && !daemon->looking) {
		daemon->looking = true;
		daemon->look = (struct job){.run = look_run, .done = look_done};
		executor_submit(daemon->server.executor, &daemon->look);
	}
	loop_timer_set(daemon->look_timer, LOOK_NS);
}

static int start_failure_watch(struct daemon *daemon)
{
	int fd = daemon->kind->ops->failure_fd(daemon->kind), r;

	if (fd < 0)
		return 0;
	r = loop_watch_new(daemon->server.loop, fd, POLLIN, on_failure, daemon, &daemon->failure_watch);
	if (r >= 0)
		r = loop_timer_new(daemon->server.loop, look_at_device, daemon, &daemon->look_timer);
	if (r >= 0)
		loop_timer_set(daemon->look_timer, LOOK_NS);
	return r;
}

static int start_signals(struct daemon *daemon)
{
	sigset_t set;
	int r = loop_timer_new(daemon->server.loop, check_stopped, daemon, &daemon->stop_timer);

	(void)sigemptyset(&set);
	(void)sigaddset(&set, SIGTERM);
	(void)sigaddset(&set, SIGINT);
	if (r >= 0)
		r = loop_signals(daemon->server.loop, &set, on_signal, daemon);
	return r < 0 ? r : start_failure_watch(daemon);
}

static int start_sockets(struct daemon *daemon)
{
	for (size_t i = 0; i < daemon->server.tenant_count; i++) {
		int r = listen_tenant(daemon, i);

		if (r < 0)
			return r;
	}
	return listen_admin(daemon);
}

static void announce(const struct daemon *daemon)
{
	const char *kind = daemon->kind->ops->name;
	char pool[KVG_SIZE_TEXT], extent[KVG_SIZE_TEXT];

	(void)kvg_size_format(daemon->config->device_size, pool);
	(void)kvg_size_format(daemon->extent_size, extent);
	log_info("kvgated %s: %s pool of %s in extents of %s, %zu tenants, state in %s", KVG_VERSION, kind, pool,
		extent, daemon->server.tenant_count, daemon->options->state_dir);
	if (!daemon->kind->ops->about(daemon->kind) && !daemon->kind->large_pages)
		log_info("kind host: the machine gives shared memory no huge pages (shmem_enabled in "
			 "/sys/kernel/mm/transparent_hugepage; \"advise\" is enough), so that memory comes and goes "
			 "several times slower");
	(void)sd_notifyf(0, "READY=1\nSTATUS=%s pool of %s, %zu tenants", kind, pool, daemon->server.tenant_count);
}

static int start(struct daemon *daemon)
{
	int r = take_lock(daemon);

	if (r >= 0)
		r = start_memory(daemon);
	if (r >= 0)
		r = start_tenants(daemon);
	if (r >= 0)
		r = start_budgets(daemon);
	if (r < 0)
		return r;
	daemon->server.spin_ns = (uint64_t)daemon->config->spin_us * 1000;
	daemon->server.wait_ns = (uint64_t)daemon->config->wait_ms * 1000000;
	daemon->server.state_dir = daemon->options->state_dir;
	if (daemon->kind->ops->about(daemon->kind))
		daemon->server.isolation = daemon->config->isolation == CONFIG_STRICT ? "strict" : "shared";
	admin_init(&daemon->admin, &daemon->server);
	r = server_start(&daemon->server);
	if (r >= 0)
		r = start_signals(daemon);
	if (r >= 0)
		r = start_reserves(daemon);
	if (r >= 0 && !daemon->stopping)
		r = start_sockets(daemon);
	return r;
}

/* ---- stop ---- */

static void stop(struct daemon *daemon)
{
	struct server *server = &daemon->server;

	for (size_t i = 0; daemon->endpoints && i < server->tenant_count; i++)
		close_endpoint(&daemon->endpoints[i]);
	close_endpoint(&daemon->admin_endpoint);
	daemon->stop_timer = loop_timer_free(daemon->stop_timer);
	daemon->failure_watch = loop_watch_free(daemon->failure_watch);
	daemon->look_timer = loop_timer_free(daemon->look_timer);
	server_end(server);
	for (size_t i = 0; i < server->tenant_count; i++)
		context_forget_all(server->tenants[i]);
	server->budgets = budgets_free(server->budgets);
	reclaim_deinit(&server->reclaim);
	if (server->pool)
		reserve_stop_all(server->pool);
	server->executor = executor_free(server->executor);
	server->tier = host_tier_free(server->tier);
	server->pool = pool_free(server->pool);
	if (!daemon->options->kind)
		daemon->kind = kind_free(daemon->kind);
	for (size_t i = 0; i < server->tenant_count; i++)
		(void)tenant_free(server->tenants[i]);
	free(server->tenants);
	free(daemon->endpoints);
	server->loop = loop_free(server->loop);
	if (daemon->lock_fd >= 0)
		(void)close(daemon->lock_fd);
}

int daemon_run(const struct config *config, const struct daemon_options *options)
{
	struct daemon daemon = {.config = config, .options = options, .lock_fd = -1};
	sigset_t set;
	int r;

	(void)sigfillset(&set);
	(void)pthread_sigmask(SIG_BLOCK, &set, NULL);
	r = start(&daemon);
	if (r >= 0 && !daemon.stopping) {
		announce(&daemon);
		r = loop_run(daemon.server.loop);
		if (r < 0) {
			log_error("io_uring: %s", strerror(-r));
			return EXIT_FAILURE; /* nothing can be taken down in order without the loop */
		}
	}
	stop(&daemon);
	if (daemon.lost_ns)
		return DAEMON_DEVICE_LOST;
	return r < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
