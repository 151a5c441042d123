-- What wrk asks a worker: random clients, one at a time or many at once. Arguments: number of clients, how many at once.
-- The last line it prints is JSON.

local clients, many
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  clients, many = tonumber(args[1]), tonumber(args[2])
  math.randomseed(clients)
  wrong = 0
end

local function client()
  return "client-" .. math.random(0, clients - 1)
end

function request()
  if many == 1 then
    return wrk.format("GET", "/v1/clients/" .. client())
  end
  local ids = {}
  for i = 1, many do
    ids[i] = '"' .. client() .. '"'
  end
  local body = '{"client_ids": [' .. table.concat(ids, ", ") .. "]}"
  return wrk.format("POST", "/v1/clients:batchGet", { ["Content-Type"] = "application/json" }, body)
end

function response(status)
  if status ~= 200 then
    wrong = wrong + 1
  end
end

function done(summary, latency)
  local bad = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  for _, thread in ipairs(threads) do
    bad = bad + thread:get("wrong")
  end
  io.write(string.format(
    '{"per_s": %.3f, "p50_ms": %.4f, "p99_ms": %.4f, "wrong": %d}\n',
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, bad
  ))
end
