package serverapi_test

import (
	"bytes"
	"strings"
	"testing"

	loggerv1 "github.com/plastron/plastron/internal/api/spire/api/server/logger/v1"
	spiretypes "github.com/plastron/plastron/internal/api/spire/api/types"
	"github.com/plastron/plastron/internal/logging"
	"github.com/plastron/plastron/internal/nodes"
	"github.com/plastron/plastron/internal/serverapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestLogger(t *testing.T) {
	var out bytes.Buffer
	log, err := logging.Settings{Level: "WARN"}.Open(&out)
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, func(c *serverapi.Config, _ *nodes.Config) { c.Log = log.Logger })
	client := loggerv1.NewLoggerClient(r.admin)
	is := func(what string, got *spiretypes.Logger, err error, want spiretypes.LogLevel) {
		t.Helper()
		if err != nil || got.GetCurrentLevel() != want || got.GetLaunchLevel() != spiretypes.LogLevel_WARN {
			t.Errorf("%s: %v, %v, want %v, launched at WARN", what, got, err, want)
		}
	}
	got, err := client.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
	is("at first", got, err, spiretypes.LogLevel_WARN)
	for number, name := range spiretypes.LogLevel_name {
		level := spiretypes.LogLevel(number)
		if level == spiretypes.LogLevel_UNSPECIFIED {
			continue
		}
		if parsed, err := logging.ParseLevel(name); err != nil || spiretypes.LogLevel(parsed) != level {
			t.Errorf("%s is %v here, %d on the wire", name, parsed, number)
		}
		got, err = client.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: level})
		is(name, got, err, level)
	}
	if _, err := client.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: spiretypes.LogLevel_DEBUG}); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []spiretypes.LogLevel{spiretypes.LogLevel_UNSPECIFIED, 8, -1, 257} {
		_, err := client.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: bad})
		if status.Code(err) != codes.InvalidArgument || reasonOf(err) != "log_level" {
			t.Errorf("%v: %v", bad, err)
		}
	}
	got, err = client.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
	is("after refusals", got, err, spiretypes.LogLevel_DEBUG)
	got, err = client.ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{})
	is("reset", got, err, spiretypes.LogLevel_WARN)
	r.stop()
	if !strings.Contains(out.String(), `msg="log level changed"`) || !strings.Contains(out.String(), "kind=debug") {
		t.Errorf("the log does not say who changed it: %s", out.String())
	}
}
