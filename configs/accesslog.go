package configs

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// AccessLog is the log of requests: a line of JSON for each, and one more when a
// long-running one begins.
type AccessLog struct {
	// Output is AccessLogStderr, AccessLogStdout or the absolute path of a file, which is
	// appended to, and opened anew on SIGHUP. Empty: there is no access log.
	Output string `mapstructure:"output"`

	// Verbs are those of the requests that are logged, as kube-apiserver has them: get,
	// list, watch and so on. Empty: all.
	Verbs []string `mapstructure:"verbs"`

	// HealthChecks logs requests for /healthz, /livez and /readyz as well.
	HealthChecks bool `mapstructure:"healthChecks"`

	// Ratio is the share of all these that is logged, 0 to 1.
	Ratio float64 `mapstructure:"ratio"`

	// Always are those of them that are logged whatever Ratio says.
	Always AccessLogAlways `mapstructure:"always"`
}

// AccessLogAlways are requests that an access log has in any case.
type AccessLogAlways struct {
	// Codes are classes of status codes: 1xx to 5xx.
	Codes []string `mapstructure:"codes"`

	// SlowerThan is how long a short request takes at least to be one of them. 0: none is.
	SlowerThan time.Duration `mapstructure:"slowerThan"`
}

// The values of [AccessLog.Output] that are no files.
const (
	AccessLogStderr = "stderr"
	AccessLogStdout = "stdout"
)

// Hundreds returns the class of codes that a text of [AccessLogAlways.Codes] names, 5 for
// 5xx; 0: none.
func Hundreds(class string) int {
	if len(class) == 3 && class[1:] == "xx" && class[0] >= '1' && class[0] <= '5' {
		return int(class[0] - '0')
	}
	return 0
}

// loggedVerbs are what accessLog.verbs may name: those of kube-apiserver, and the methods
// of requests that are not for a resource.
var loggedVerbs = []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "proxy", "post", "put", "head", "options"}

func checkAccessLog(l *AccessLog) Errors {
	var errs Errors
	switch {
	case l.Output == "", l.Output == AccessLogStderr, l.Output == AccessLogStdout:
	case !filepath.IsAbs(l.Output):
		errs.add(problem("accessLog.output", l.Output, "this is neither a place to log to nor an absolute path", "write stderr, stdout or a path such as /var/log/apiserver-lb/access.log"))
	case strings.HasSuffix(l.Output, "/"), strings.ContainsFunc(l.Output, func(r rune) bool { return r < ' ' || r == 0x7f }):
		errs.add(problem("accessLog.output", l.Output, "this is no path of a file", "write a path such as /var/log/apiserver-lb/access.log"))
	}
	for i, v := range l.Verbs {
		if !slices.Contains(loggedVerbs, v) {
			errs.add(problem(fmt.Sprintf("accessLog.verbs[%d]", i), v, "there is no such verb", "write some of "+strings.Join(loggedVerbs, ", ")))
		}
	}
	errs = append(errs, ratio("accessLog.ratio", l.Ratio)...)
	if l.Ratio == 0 && l.Output != "" && len(l.Always.Codes) == 0 && l.Always.SlowerThan == 0 {
		errs.add(problem("accessLog.ratio", "0", "nothing would be logged", "write a larger ratio, or set accessLog.always, or remove accessLog.output"))
	}
	for i, c := range l.Always.Codes {
		if Hundreds(c) == 0 {
			errs.add(problem(fmt.Sprintf("accessLog.always.codes[%d]", i), c, "there is no such class of status codes", "write some of 1xx, 2xx, 3xx, 4xx, 5xx"))
		}
	}
	return append(errs, notNegative("accessLog.always.slowerThan", l.Always.SlowerThan)...)
}
